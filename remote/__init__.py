"""fal: the same edit on the endpoints that the local nodes mirror. Knows no host, and loads its libraries late."""
