"""How what a run says gets from its journals to MLflow."""
