"Processes of their own that begin with what the tests have imported already: to import it anew takes seven seconds."
import importlib, multiprocessing, os, sys
from concurrent.futures import ProcessPoolExecutor

from fastai.torch_core import default_device

# a fork cannot use the GPU that its parent uses
context = multiprocessing.get_context('fork' if os.environ.get('KDNB_DEVICE', 'cpu')=='cpu' else 'spawn')

def _on_cpu(f, *args, **kwargs):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    default_device(False)
    return f(*args, **kwargs)

def start(f, *args, **kwargs):
    "`f` runs elsewhere, on the CPU; the process"
    p = context.Process(target=_on_cpu, args=(f,*args), kwargs=kwargs, daemon=True)     # it ends with this one
    p.start()
    return p

def elsewhere(f, *args):
    "`f(*args)`, computed on the CPU; nothing else of what it does stays here"
    with ProcessPoolExecutor(1, mp_context=context) as pool: return pool.submit(_on_cpu, f, *args).result()

def _main(module, job):
    sys.argv = ['-c', job]
    getattr(importlib.import_module(module), '_main')()

class Worker:
    "What kdnb's `worker_process` starts, as a fork"
    def __init__(self, module, job, i=0): self.process = start(_main, module, job)
    @property
    def returncode(self): return self.process.exitcode
    def poll(self): return self.returncode
    def wait(self, timeout=None): self.process.join(timeout); return self.returncode
    def kill(self): self.process.kill()
    def terminate(self): self.process.terminate()
