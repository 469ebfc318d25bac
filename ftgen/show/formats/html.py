"""Tables as a page of HTML. In: a `View`. Out: one file, which needs no other."""

from ftgen.results.keys import View
from ftgen.show.pages import page
from ftgen.show.tables import remarks, tabulate


def render(view: View) -> str:
    """The page."""
    return page("tables.html.j2", tables=tabulate(view), remarks=remarks(view.runs))
