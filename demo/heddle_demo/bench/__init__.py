"""`heddle bench`: what the number of adapters costs, and which eviction policy brings the fewest bytes back."""
