"""Options of the commands: made from the settings models, completed by the shell, shared by several commands."""
