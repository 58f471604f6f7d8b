"""Load put on whole servers by heddle-loadtest: the tables of docs/performance.md that come from result folders."""
