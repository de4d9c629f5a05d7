"""Scores of the four tasks from gathered predictions, the report, and the contact sheet. No model is needed here."""
