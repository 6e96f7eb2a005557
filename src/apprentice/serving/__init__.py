"""The student as a player: in this process, or on vLLM."""
