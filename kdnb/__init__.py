"Knowledge distillation, variational group sparsification and pruning for fastai"
from kdnb import _moved
from importlib.metadata import PackageNotFoundError, version
try: __version__ = version('kdnb')
except PackageNotFoundError: __version__ = '0+unknown'
