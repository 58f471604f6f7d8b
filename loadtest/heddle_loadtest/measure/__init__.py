"""Numbers out of requests: latencies, goodput, fairness, intervals, comparisons. Sends and draws nothing."""
