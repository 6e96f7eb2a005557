"""Who plays without weights of ours. A module here is named after the `policy` of params.yaml that it is."""
