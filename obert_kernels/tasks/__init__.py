"""Models and labelled texts behind the commands."""
