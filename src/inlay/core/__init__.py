"""The idea: edits of what frozen layers say, hung on places of an untouched model. Imports torch only."""
