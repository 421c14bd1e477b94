/* TensorRT for the null GPU: a registry without plugins, which the provider goes through before it
 * reads its options. build.py's weak stubs (return 0: no builder, no runtime) are the rest. */
static long none(void) { return 0; }
static void *methods[64], *registry[1] = {methods}; /* an object of C++: its virtual methods */

void *getPluginRegistry(void) {
    for (int n = 0; n < 64; n++) methods[n] = (void *)none;
    return registry;
}
