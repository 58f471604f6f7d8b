"""`heddle adapters convert`: other libraries' adapters as folders that can be uploaded, made where the user runs it."""
