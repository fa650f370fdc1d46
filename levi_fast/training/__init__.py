"""Training the adapting layers and the task model, selecting on ID validation data, and scoring."""
