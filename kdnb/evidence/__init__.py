"Grids that were run, the rows that came out, and what they say about a claim"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), 'evidence.rows', 'evidence.work', 'evidence.tables')
