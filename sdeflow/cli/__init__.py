"""The command line. `strings` turns text into objects, `plan` objects into runs, `app` is what typer shows."""
