
 PLMergeStalled: no space left on device; stalled, merge at 25.0 % (1 B of 4 B)