"Everything of kdnb in one line: `from kdnb.all import *`"
from fastai.vision.all import *
from kdnb.data import *
from kdnb.models import *
from kdnb.measure import *
from kdnb.features import *
from kdnb.channels import *
from kdnb.terms import *
from kdnb.distill.losses import *
from kdnb.distill.methods import *
from kdnb.distill.callback import *
from kdnb.variational.layers import *
from kdnb.variational.callback import *
from kdnb.export import *
from kdnb.recipes.core import *
from kdnb.recipes.vbgs_kd import *
from kdnb.report import *
