"""The local disk: what capture writes there is, byte for byte, the dataset that the user wants."""
