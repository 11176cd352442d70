from tests.faults.test_slow_storage import *
def test_peaks(wide_fields, s3_url, s3_server, proxy, proxied, tmp_path):
    report = run(wide_fields(tmp_path / "store")).report
    proxy.throttle = Throttle(report["nbytes_written"] / report["seconds_forward"] / 2)
    for i,n in enumerate((6,12,24,48,6,12,24,24)):
        o=Child(wide_fields(f"{s3_url}/{i}", n), proxied).outcome()
        print(proxied["ACTSTORE_S3"], n, o.peak_nbytes/1e6, o.report["seconds_waiting"], o.report["seconds_running"], flush=True)
