def run(config):
    raise NotImplementedError
