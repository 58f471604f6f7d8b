"""`heddle doctor`: is this machine fit to serve, and does a running server keep its adapters apart."""
