"""heddle-loadtest: puts load on any OpenAI-compatible server and reports what its users would have felt.

Speaks HTTP only and imports nothing of heddle's other packages. To use it from Python:
`client.ChatClient` for single requests, `spec.ClosedLoopSpec` with `runner.run_closed_loop` for a run, and
`report.print_summary` to show it. Nothing is imported here, so that `heddle-loadtest --help` stays fast.
"""
