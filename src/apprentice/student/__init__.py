"""The vision-language model: the tiny one and any other, how it is given a chat, its adapter, what makes it fast."""
