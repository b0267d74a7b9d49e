"What a run did on one page, and runs side by side"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), 'show', 'drawing', *(f'report.{o}' for o in 'numbers figures exhibits page comparison'.split()))
