"Processes of their own that begin with what the tests have imported already: to import it anew takes seven seconds."
import multiprocessing, os
from concurrent.futures import ProcessPoolExecutor

# a fork cannot use the GPU that its parent uses
context = multiprocessing.get_context('fork' if os.environ.get('KDNB_DEVICE', 'cpu')=='cpu' else 'spawn')

def start(f, *args, **kwargs):
    "`f` runs elsewhere; the process"
    p = context.Process(target=f, args=args, kwargs=kwargs)
    p.start()
    return p

def elsewhere(f, *args):
    "`f(*args)`, and nothing else of what it does stays here"
    with ProcessPoolExecutor(1, mp_context=context) as pool: return pool.submit(f, *args).result()
