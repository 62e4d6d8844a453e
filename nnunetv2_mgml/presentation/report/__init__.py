"""The HTML report: one self-contained page with summary, sortable tables, figures and a slice viewer.

Data flow: `content` (numbers and tables from an evaluation) and `charts` (its figures); for the viewer `cases` (which
cases, their volumes) -> `sprites` (small pictures of slices and label masks) and `sheets` (qualitative figures);
`page` puts all of it into ``page.html``, with ``style.css``, ``table.js`` and ``viewer.js`` inlined.
"""
