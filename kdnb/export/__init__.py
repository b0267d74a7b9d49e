"A small network out of the door: a file others can read, ONNX with its proof, eight bits, and what runs it fastest"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), *(f'export.{o}' for o in 'images packed build files session quantize onnx speed forms hub'.split()))
