"A small network out of the door: a file that others can read, ONNX with its proof, eight bits, and what runs it fastest"
from importlib import import_module

__all__ = []
for _room in ('images','packed','build','files','session','quantize','onnx','speed','forms','hub'):
    _room = import_module(f'kdnb.export.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
