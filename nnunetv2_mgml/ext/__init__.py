"""The folder ``nnUNet_extTrainer`` names. It must hold re-exports only.

nnU-Net imports every module in it by its bare name and forgets it after the lookup; a class defined here would be a
new one each time, and could not be pickled.
"""
