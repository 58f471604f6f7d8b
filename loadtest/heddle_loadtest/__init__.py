"""heddle-loadtest: puts load on any OpenAI-compatible server and reports what its users would have felt.

Speaks HTTP only and imports nothing of heddle's other packages. To use it from Python: `client.chat_client.ChatClient`
for single requests; `workload.spec_file.load_workload` or `workload.spec.Workload` with `run.experiment.run_experiment`
for a run, `measure.summary.summarize` for its numbers and `report.tables.print_summary` to show them. Nothing is
imported here, so that `heddle-loadtest --help` stays fast.
"""
