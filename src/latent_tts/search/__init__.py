"""Which rollouts are grown: all of them independently, or those that the scorer keeps."""
