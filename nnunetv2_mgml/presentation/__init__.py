"""Tables, figures, the HTML report and what a network holds inside, for people to look at."""
