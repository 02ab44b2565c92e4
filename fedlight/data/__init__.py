"""Data sets as tensors, their partitions over clients, and the batches of one client.

- `dataset`: the types `Dataset` and `Images`.
- `digits`, `fmnist`, `cifar10`, `celeba`, `image_folder`, `placeholder`: one data set each, by its `load`.
- `partition`: training images to clients; `client_data`: batches of one client.
- `folder_files`, `folder_layout`: the content of a folder; `image_file`, `pixel_range`, `image_cache`: its
  images.
- `data_name`, `file_hashes`: the name in a cell's id; `class_names`: classes of published sets; `download`.
"""
