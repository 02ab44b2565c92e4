"""Data sets as tensors, their partitions over clients, and the batches of one client.

- `dataset`: the types `Dataset` and `Images`.
- `loading`: the configured data set; `digits`, `fmnist`, `cifar10`, `celeba`, `image_folder`: one set each.
- `placeholder`: a set without images, for a server that holds none.
- `partition`: training images to clients; `client_data`: batches of one client.
- `folder_files`, `folder_layout`: the content of a folder; `image_file`, `pixel_range`, `image_cache`: its
  images.
- `data_name`, `file_hashes`: the name in a cell's id; `class_names`: classes of published sets; `download`.
"""
