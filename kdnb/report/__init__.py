"What a run did on one page, and runs side by side"
from importlib import import_module

__all__ = []
for _room in ('show','drawing','report.numbers','report.figures','report.exhibits','report.page','report.comparison'):
    _room = import_module(f'kdnb.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
