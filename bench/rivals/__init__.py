"""The competitors, one small module each.

A rival is a module with NAME, KEEP (how many of its candidates reach the table) and two functions,
forward(problem, quick) and decode(problem), which return {label: factory}; a factory prepares tables and buffers and
returns the call that is timed. A call returns o, freshly allocated, in the dtype of the inputs. A factory that raises
is left out, with its reason in the output. All of them work on the problem's device, or say there that they cannot by
returning nothing. Those of TRAINING have training(problem, quick), whose calls return o and gradients by name.
"""

from rivals import fla, minimax, torch_autograd, torch_chunk, torch_chunk_half, torch_decode, torch_quadratic

ALL = (torch_chunk, torch_chunk_half, torch_quadratic, minimax, torch_decode, fla)
TRAINING = (torch_autograd, fla)
