"""Weights of others in, ours out: the original project's files, safetensors, and diffusers folders.

checkpoint_file   what is in a file, without running anything that is in it
contents          which parts a file holds, by keys and shapes, and which settings they fit
entry             one of our tensors and those of another layout that it is made of, both ways
compvis           the original's layout: which key is what, EMA, buffers, what is dropped and why
text              text encoders: the original's and diffusers' transformer, CLIP's towers
diffusers         names and configurations of diffusers' classes
diffusers_text    text encoders and tokenizers in diffusers' folders
diffusers_folder  whole folders, with scheduler and index
"""
