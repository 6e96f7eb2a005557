"""A model behind OpenAI's chat API: the client, its replies (kept, for they were paid for), prices."""
