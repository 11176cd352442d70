from tests.faults.test_crash_points import *
def test_count(disk_points, make_fields, s3_url, proxy, proxied):
    run(make_fields(s3_url,3), proxied)
    print(len(disk_points), len({p.step for p in disk_points}), 2*len([r for r in proxy.requests if r.is_write]))
