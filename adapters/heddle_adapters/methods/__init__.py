"""The families of adapter methods, one file each, and what several of them share."""
