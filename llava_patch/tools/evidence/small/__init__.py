"""The small models: tasks that are rendered, models made from configurations, their training."""
