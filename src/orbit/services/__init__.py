"""The loops of a node: scheduler, runner, dispatcher, heartbeat, janitor."""
