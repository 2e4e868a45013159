"""Tables of a report: what is in a cell of them, the columns, and the tables as text."""
