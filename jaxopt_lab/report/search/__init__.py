"""The pictures of a search: of a study of Optuna's, or of a population's `Result`; one kind a file, all of them by `trials`."""
