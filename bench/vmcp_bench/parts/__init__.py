"""The parts of the report, in the order in which they run. Each is a module with NAME, TITLE, seconds(plan) and run(context).

seconds() says how long the part takes, roughly, on a host whose disk takes plan.disk_bytes_per_s; it decides nothing.
"""

from . import arming, backing, boot, checkpoint, clone_start, clones, depth, disk, disk_engine, disk_io, every, floor, incremental, net_io, nth, peers, restore, reverts, small, stalls, store

ALL = (boot, floor, stalls, checkpoint, arming, nth, incremental, small, disk, disk_engine, disk_io, net_io, peers, restore, reverts, depth, clones, clone_start, every, backing, store)
