from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter
