package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// parse reads a command line as run does.
func parse(t *testing.T, args ...string) (*apic.Config, *apic.HostConfig, error) {
	t.Helper()
	var c containerFlags
	f := pflag.NewFlagSet("run", pflag.ContinueOnError)
	c.register(f)
	if err := f.Parse(args); err != nil {
		return nil, nil, err
	}
	tt, err := c.configs(f, f.Args())
	if err != nil {
		return nil, nil, err
	}
	return tt.config, tt.host, nil
}

func TestContainerFlags(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("FROM_CALLER", "here")
	os.Unsetenv("NOT_SET") //nolint:errcheck // can't fail
	envFile := filepath.Join(dir, "env")
	profile := filepath.Join(dir, "seccomp.json")
	for name, content := range map[string]string{envFile: "\ufeff# comment\n\n  FILE=1 2 \nFROM_CALLER\nNOT_SET\n", profile: "{ \"defaultAction\" : \"SCMP_ACT_ALLOW\" }"} {
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name string
		args []string
		want func(c *apic.Config, h *apic.HostConfig) any
		is   string // as JSON
	}{
		{"image and command", []string{"-it", "img", "sh", "-c", "x", "--rm"}, func(c *apic.Config, h *apic.HostConfig) any {
			return []any{c.Image, c.Cmd, c.Tty, c.OpenStdin, c.StdinOnce, c.AttachStdin, h.AutoRemove}
		}, `["img",["sh","-c","x","--rm"],true,true,true,true,false]`},
		{"no command", []string{"img"}, func(c *apic.Config, h *apic.HostConfig) any {
			return []any{c.Cmd, c.Entrypoint, c.AttachStdin, c.AttachStdout, h.NetworkMode, h.RestartPolicy.Name, h.PidsLimit, h.Init}
		}, `[null,null,false,true,"default","no",null,null]`},
		{"environment", []string{"--env-file", envFile, "-e", "A=b=c", "-e", "FROM_CALLER", "-e", "NOT_SET", "-e", "E=", "img"}, func(c *apic.Config, _ *apic.HostConfig) any { return c.Env },
			`["FILE=1 2 ","FROM_CALLER=here","A=b=c","FROM_CALLER=here","NOT_SET","E="]`},
		{"entrypoint", []string{"--entrypoint", "/bin/x", "img", "y"}, func(c *apic.Config, _ *apic.HostConfig) any { return []any{c.Entrypoint, c.Cmd} }, `[["/bin/x"],["y"]]`},
		{"no entrypoint", []string{"--entrypoint=", "img"}, func(c *apic.Config, _ *apic.HostConfig) any { return c.Entrypoint }, `[""]`},
		{"hostname, user, workdir", []string{"-h", "me", "-u", "1:2", "-w", "/w", "img"}, func(c *apic.Config, _ *apic.HostConfig) any {
			return []any{c.Hostname, c.User, c.WorkingDir}
		}, `["me","1:2","/w"]`},
		{"limits", []string{"-m", "1.5g", "--cpus", ".5", "--pids-limit", "-1", "img"}, func(_ *apic.Config, h *apic.HostConfig) any {
			return []any{h.Memory, h.NanoCPUs, h.PidsLimit}
		}, `[1610612736,500000000,-1]`},
		{"labels", []string{"-l", "a", "--label", "b=c=d", "img"}, func(c *apic.Config, _ *apic.HostConfig) any { return c.Labels }, `{"a":"","b":"c=d"}`},
		{"stop", []string{"--stop-signal", "QUIT", "--stop-timeout", "0", "img"}, func(c *apic.Config, _ *apic.HostConfig) any {
			return []any{c.StopSignal, c.StopTimeout}
		}, `["QUIT",0]`},
		{"restart", []string{"--restart", "on-failure:3", "img"}, func(_ *apic.Config, h *apic.HostConfig) any { return h.RestartPolicy },
			`{"Name":"on-failure","MaximumRetryCount":3}`},
		{"hosts", []string{"--add-host", "a:1.2.3.4", "--add-host", "b=[::1]", "--add-host", "c:::2", "--add-host", "d:host-gateway", "--dns", "9.9.9.9", "img"},
			func(_ *apic.Config, h *apic.HostConfig) any { return []any{h.ExtraHosts, h.DNS} }, `[["a:1.2.3.4","b:::1","c:::2","d:host-gateway"],["9.9.9.9"]]`},
		{"switches", []string{"--init", "--read-only", "--privileged", "-P", "--cap-add", "SYS_TIME", "--cap-drop=ALL", "--network", "none", "img"}, func(_ *apic.Config, h *apic.HostConfig) any {
			return []any{h.Init, h.ReadonlyRootfs, h.Privileged, h.PublishAllPorts, h.CapAdd, h.CapDrop, h.NetworkMode}
		}, `[true,true,true,true,["SYS_TIME"],["ALL"],"none"]`},
		{"mounts", []string{"-v", "/a:/b:ro", "-v", "vol:/v", "-v", "/anon", "--tmpfs", "/t:size=1m", "--mount", "type=tmpfs,dst=/u,tmpfs-size=1k,tmpfs-mode=700", "img"},
			func(c *apic.Config, h *apic.HostConfig) any { return []any{h.Binds, c.Volumes, h.Tmpfs, h.Mounts} },
			`[["/a:/b:ro","vol:/v"],{"/anon":{}},{"/t":"size=1m"},[{"Type":"tmpfs","Target":"/u","TmpfsOptions":{"SizeBytes":1024,"Mode":448}}]]`},
		{"more mounts", []string{"--volumes-from", "a:ro", "--volumes-from", "b", "--storage-opt", "size=1g", "--volume-driver", "local", "--userns", "auto", "img"},
			func(_ *apic.Config, h *apic.HostConfig) any {
				return []any{h.VolumesFrom, h.StorageOpt, h.VolumeDriver, h.UsernsMode}
			},
			`[["a:ro","b"],{"size":"1g"},"local","auto"]`},
		{"security", []string{"--security-opt", "seccomp=" + profile, "--security-opt", "no-new-privileges", "--security-opt", "systempaths=unconfined", "--security-opt", "apparmor:x", "img"},
			func(_ *apic.Config, h *apic.HostConfig) any {
				return []any{h.SecurityOpt, h.MaskedPaths, h.ReadonlyPaths}
			},
			`[["seccomp={\"defaultAction\":\"SCMP_ACT_ALLOW\"}","no-new-privileges","apparmor=x"],[],[]]`},
		{"devices", []string{"--device", "/dev/a", "--device", "/dev/b:rw", "--device", "/dev/c:/dev/../x", "--device", "/dev/d:/d:m", "--device", "v.com/c=n", "img"},
			func(_ *apic.Config, h *apic.HostConfig) any {
				return []any{h.Devices, h.DeviceRequests}
			},
			`[[{"PathOnHost":"/dev/a","PathInContainer":"/dev/a","CgroupPermissions":"rwm"},{"PathOnHost":"/dev/b","PathInContainer":"/dev/b","CgroupPermissions":"rw"},` +
				`{"PathOnHost":"/dev/c","PathInContainer":"/x","CgroupPermissions":"rwm"},{"PathOnHost":"/dev/d","PathInContainer":"/d","CgroupPermissions":"m"}],` +
				`[{"Driver":"cdi","Count":0,"DeviceIDs":["v.com/c=n"],"Capabilities":null,"Options":null}]]`},
		{"gpus", []string{"--gpus", "all", "--gpus", `"device=0,1",driver=nvidia,"options=a=b,c=d"`, "img"}, func(_ *apic.Config, h *apic.HostConfig) any { return h.DeviceRequests },
			`[{"Driver":"","Count":-1,"DeviceIDs":null,"Capabilities":[["gpu"]],"Options":{}},{"Driver":"nvidia","Count":0,"DeviceIDs":["0","1"],"Capabilities":[["gpu"]],"Options":{"a":"b","c":"d"}}]`},
		{"some streams", []string{"-a", "STDOUT", "-a", "stdin", "img"}, func(c *apic.Config, _ *apic.HostConfig) any {
			return []any{c.AttachStdin, c.AttachStdout, c.AttachStderr, c.OpenStdin, c.StdinOnce}
		}, `[true,true,false,false,false]`},
		{"-i joins the input", []string{"-i", "-a", "stderr", "img"}, func(c *apic.Config, _ *apic.HostConfig) any {
			return []any{c.AttachStdin, c.AttachStdout, c.AttachStderr, c.StdinOnce}
		}, `[true,false,true,true]`},
		{"process", []string{"--group-add", "1", "--group-add", "x", "--umask", "027", "--ulimit", "nofile=1:2", "--ulimit", "core=-1", "--ulimit", "nofile=3", "img"},
			func(_ *apic.Config, h *apic.HostConfig) any { return []any{h.GroupAdd, h.Umask, h.Ulimits} },
			`[["1","x"],23,[{"Name":"core","Hard":-1,"Soft":-1},{"Name":"nofile","Hard":3,"Soft":3}]]`},
		{"namespaces", []string{"--pid", "container:x", "--ipc", "none", "--uts", "host", "--cgroupns", "private", "--domainname", "a.b", "--sysctl", "net.x=1=2", "--sysctl", "fs.mqueue.y=", "img"},
			func(c *apic.Config, h *apic.HostConfig) any {
				return []any{h.PidMode, h.IpcMode, h.UTSMode, h.CgroupnsMode, c.Domainname, h.Sysctls}
			}, `["container:x","none","host","private","a.b",{"fs.mqueue.y":"","net.x":"1=2"}]`},
		{"private pid", []string{"--pid", "private", "img"}, func(_ *apic.Config, h *apic.HostConfig) any { return h.PidMode }, `""`},
		{"meta", []string{"--label-file", envFile, "-l", "FILE=2", "--annotation", "a=b", "--annotation", "c", "--isolation", "default", "--disable-content-trust", "img"},
			func(c *apic.Config, h *apic.HostConfig) any { return []any{c.Labels, h.Annotations, h.Isolation} }, `[{"FILE":"2"},{"a":"b","c":""},"default"]`},
		{"names", []string{"--dns-search", "a.b.", "--dns-search", ".", "--dns-opt", "x", "--dns-option", "y", "--link", "a", "--link", "b:c", "img"},
			func(_ *apic.Config, h *apic.HostConfig) any { return []any{h.DNSSearch, h.DNSOptions, h.Links} }, `[["a.b","."],["x","y"],["a","b:c"]]`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, h, err := parse(t, tt.args...)
			if err != nil {
				t.Fatal(err)
			}
			got, err := toJSON(tt.want(c, h))
			if err != nil {
				t.Fatal(err)
			}
			if got != tt.is {
				t.Errorf("got  %s\nwant %s", got, tt.is)
			}
		})
	}
}

func TestContainerFlagErrors(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(bad, []byte("A=1\nB C=2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--restart", "sometimes"}, "unknown policy 'sometimes'"},
		{[]string{"--restart", "always:3"}, "maximum retry count can only be used with 'on-failure'"},
		{[]string{"--restart", "on-failure:x"}, "maximum retry count must be an integer"},
		{[]string{"--rm", "--restart", "always"}, "cannot specify both --restart and --rm"},
		{[]string{"--cpus", "x"}, "failed to parse"},
		{[]string{"--cpus", "0.0000000001"}, "value is too precise"},
		{[]string{"--cpus", "-1"}, "value is negative"},
		{[]string{"-m", "x"}, "invalid size"},
		{[]string{"--stop-timeout", "x"}, "invalid syntax"},
		{[]string{"--stop-signal", "NOSUCH"}, "invalid signal: NOSUCH"},
		{[]string{"-w", "rel"}, "needs to be an absolute path"},
		{[]string{"--pull", "x"}, "invalid pull option"},
		{[]string{"--add-host", "x"}, "bad format for add-host"},
		{[]string{"--add-host", "x:y"}, "invalid IP address in add-host"},
		{[]string{"--dns", "x"}, "IP address is not correctly formatted"},
		{[]string{"-e", "=x"}, "invalid environment variable"},
		{[]string{"--env-file", bad}, ":2: variable 'B C' contains whitespaces"},
		{[]string{"--env-file", "/nonexistent/file"}, "no such file"},
		{[]string{"--security-opt", "x"}, "invalid --security-opt"},
		{[]string{"--security-opt", "colour=red"}, "invalid --security-opt"},
		{[]string{"--security-opt", "seccomp=/nonexistent/file"}, "opening seccomp profile"},
		{[]string{"--network", "name=x,color=y"}, "invalid field key color"},
		{[]string{"--network", "x", "--network", "host"}, "cannot attach both user-defined and non-user-defined network-modes"},
		{[]string{"--gpus", "some"}, `invalid count (some): value must be either "all" or an integer`},
		{[]string{"--gpus", "count=1,count=2"}, "'count' can be specified only once"},
		{[]string{"--gpus", "colour=red"}, "unexpected key 'colour'"},
		{[]string{"--device", "null"}, "null is not an absolute path"},
		{[]string{"--device", "/dev/null:null"}, "null is not an absolute path"},
		{[]string{"--device", "/a:/b:z"}, "bad mode specified: z"},
		{[]string{"--device", "/a:/b:rr"}, "bad mode specified: rr"},
		{[]string{"--device", "/a:/b:r:w"}, "bad format for path: /a:/b:r:w"},
		{[]string{"--device", ""}, "bad format for path"},
		{[]string{"-a", "stdlog"}, "valid streams are STDIN, STDOUT and STDERR"},
		{[]string{"--ulimit", "nofile"}, "invalid ulimit argument: nofile"},
		{[]string{"--ulimit", "colour=1"}, "invalid ulimit type: colour"},
		{[]string{"--ulimit", "nofile=2:1"}, "soft limit must be less than or equal to hard limit: 2 > 1"},
		{[]string{"--umask", "9"}, "must be an octal value"},
		{[]string{"--umask", "7777"}, "must be an octal value"},
		{[]string{"--sysctl", "kernel.core_pattern=|/x"}, "sysctl 'kernel.core_pattern=|/x' is not allowed"},
		{[]string{"--sysctl", "net.core.somaxconn"}, "is not allowed"},
		{[]string{"--sysctl", "kernel.domainname=x"}, "is not allowed"},
		{[]string{"--pid", "container:"}, "--pid: invalid PID mode"},
		{[]string{"--uts", "private"}, "--uts: invalid UTS mode"},
		{[]string{"--cgroupns", "x"}, "--cgroupns: invalid CGROUP mode"},
		{[]string{"--isolation", "hyperv"}, `invalid isolation "hyperv": linux only supports 'default'`},
		{[]string{"--disable-content-trust=false"}, "does not verify signatures"},
		{[]string{"--use-api-socket"}, "conex has no daemon"},
		{[]string{"-l", "=x"}, "invalid label '=x': empty name"},
		{[]string{"-l", "a b=x"}, "label 'a b' contains whitespaces"},
		{[]string{"--label-file", "/nonexistent/file"}, "no such file"},
		{[]string{"--annotation", "=x"}, "the empty string is not permitted"},
		{[]string{"--dns-search", "!"}, "! is not a valid domain"},
		{[]string{"--dns-search", "1.2"}, "1.2 is not a valid domain"},
		{[]string{"--dns-search", "a..b"}, "a..b is not a valid domain"},
		{[]string{"--link", "a:b:c"}, "bad format for links: a:b:c"},
		{[]string{"--ip", "1.2.3"}, `invalid argument "1.2.3" for "--ip" flag: failed to parse IP`},
		{[]string{"--ip", "x"}, "failed to parse IP"},
		{[]string{"--tmpfs", "rel"}, "must be absolute"},
	} {
		_, _, err := parse(t, append(tt.args, "img")...)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: error %v, want %q", tt.args, err, tt.want)
		}
	}
}

// TestDockerFlags holds run's flags against the list of Docker's: each is either supported or refused by name, never unknown.
func TestDockerFlags(t *testing.T) {
	const docker = `add-host annotation attach blkio-weight blkio-weight-device cap-add cap-drop cgroup-parent cgroupns cidfile cpu-count cpu-percent
cpu-period cpu-quota cpu-rt-period cpu-rt-runtime cpu-shares cpus cpuset-cpus cpuset-mems device device-cgroup-rule device-read-bps
device-read-iops device-write-bps device-write-iops disable-content-trust dns dns-option dns-search domainname entrypoint env env-file expose
gpus group-add health-cmd health-interval health-retries health-start-interval health-start-period health-timeout help hostname init interactive
io-maxbandwidth io-maxiops ip ip6 ipc isolation kernel-memory label label-file link link-local-ip log-driver log-opt mac-address memory
memory-reservation memory-swap memory-swappiness mount name network network-alias no-healthcheck oom-kill-disable oom-score-adj pid pids-limit
platform privileged publish publish-all pull quiet read-only restart rm runtime security-opt shm-size stop-signal stop-timeout storage-opt
sysctl tmpfs tty ulimit use-api-socket user userns umask uts volume volume-driver volumes-from workdir`
	var c containerFlags
	f := pflag.NewFlagSet("run", pflag.ContinueOnError)
	c.register(f)
	for _, name := range strings.Fields(docker) {
		if f.Lookup(name) == nil {
			t.Errorf("--%s is unknown", name)
		}
	}
}

func TestParseVolume(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ in, bind, anonymous, own, err string }{
		{"/a:/b", "/a:/b", "", "", ""},
		{"/a/../c:/b:ro,rshared", "/c:/b:ro,rshared", "", "", ""},
		{"./x:/b", wd + "/x:/b", "", "", ""},
		{".:/b", wd + ":/b", "", "", ""},
		{"name:/b:nocopy", "name:/b:nocopy", "", "", ""},
		{"/b", "", "/b", "", ""},
		{"/a:/b:idmap", "/a:/b", "", "auto", ""},
		{"/a:/b:ro,idmap=auto", "/a:/b:ro", "", "auto", ""},
		{"/a:/b:idmap=5:6,z", "/a:/b:z", "", "5:6", ""},
		{"/a:/b:idmap=5", "/a:/b", "", "5", ""},
		{"name", "", "", "", "mount path must be absolute"},
		{"/", "", "", "", "destination can't be '/'"},
		{"/a::ro", "", "", "", "empty section"},
		{"/a:/b:ro:x", "", "", "", "too many colons"},
		{"/a:/b:U", "/a:/b", "", "auto", ""},
		{"name:/b:z,U", "name:/b:z", "", "auto", ""},
		{"/a:/b:O", "/a:/b", "", "discard", ""},
		{"/a:/b:overlay", "/a:/b", "", "discard", ""},
		{"/a:/b:z,overlay=keep", "/a:/b:z", "", "keep", ""},
		{"/a:/b:O,upperdir=/u", "", "", "", "changes lie with the container"},
		{"", "", "", "", "invalid empty volume spec"},
	} {
		bind, anonymous, own, err := parseVolume(tt.in)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: error %v, want %q", tt.in, err, tt.err)
			}
			continue
		}
		if err != nil || bind != tt.bind || anonymous != tt.anonymous || own.idMap+own.overlay != tt.own {
			t.Errorf("%q: %q, %q, %q, %v", tt.in, bind, anonymous, own, err)
		}
	}
}

func TestParseMount(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ in, want string }{
		{"type=bind,source=/d,target=/x", `{"Type":"bind","Source":"/d","Target":"/x"}`},
		{"type=bind,src=/d,dst=/x,readonly,bind-propagation=rshared", `{"Type":"bind","Source":"/d","Target":"/x","ReadOnly":true,"BindOptions":{"Propagation":"rshared"}}`},
		{"type=bind,src=./d,destination=/x,ro=false,bind-recursive=disabled", `{"Type":"bind","Source":"` + wd + `/d","Target":"/x","BindOptions":{"NonRecursive":true}}`},
		{"type=bind,src=/d,dst=/x,bind-create-src,consistency=cached", `{"Type":"bind","Source":"/d","Target":"/x","Consistency":"cached","BindOptions":{"CreateMountpoint":true}}`},
		{"type=bind,src=/d,dst=/x,ro,bind-recursive=readonly,bind-propagation=rprivate", `{"Type":"bind","Source":"/d","Target":"/x","ReadOnly":true,"BindOptions":{"Propagation":"rprivate","ReadOnlyForceRecursive":true}}`},
		{"source=vol,target=/x,volume-nocopy", `{"Type":"volume","Source":"vol","Target":"/x","VolumeOptions":{"NoCopy":true}}`},
		{"src=vol,dst=/x,volume-label=a=b,volume-label=c,volume-driver=d,volume-opt=e=f=g,volume-subpath=h", `{"Type":"volume","Source":"vol","Target":"/x","VolumeOptions":{"Labels":{"a":"b","c":""},"Subpath":"h","DriverConfig":{"Name":"d","Options":{"e":"f=g"}}}}`},
		{`type=bind,"source=/d,e",target=/x`, `{"Type":"bind","Source":"/d,e","Target":"/x"}`},
		{"type=image,source=x,target=/x,image-subpath=a/b", `{"Type":"image","Source":"x","Target":"/x","ImageOptions":{"Subpath":"a/b"}}`},
		{"type=tmpfs,target=/x,tmpfs-size=1m,tmpfs-mode=1700", `{"Type":"tmpfs","Target":"/x","TmpfsOptions":{"SizeBytes":1048576,"Mode":960}}`},
		{"type=bind,source=/d,target=/x,tmpfs-size=1", "!cannot mix 'tmpfs-*' options with mount type 'bind'"},
		{"type=tmpfs,target=/x,bind-propagation=shared", "!cannot mix 'bind-*' options with mount type 'tmpfs'"},
		{"type=bind,colour=red,target=/x", "!unknown option 'colour' in 'colour=red'"},
		{"type=bind,nonsense", "!invalid field 'nonsense' must be a key=value pair"},
		{"type=bind,source=,target=/x", "!invalid value for 'source': value is empty"},
		{"type=bind, source=/d", "!option should not have whitespace"},
		{"type=bind,source=/d,target=/x,readonly=perhaps", `!invalid value for 'readonly': invalid boolean value ("perhaps")`},
		{"type=bind,source=/d,target=/x,bind-recursive=writable", "!'bind-recursive=writable' requires 'readonly'"},
		{"type=bind,source=/d,target=/x,ro,bind-recursive=readonly", "!requires 'bind-propagation=rprivate'"},
		{"type=tmpfs,target=/x,tmpfs-mode=9", "!invalid value for tmpfs-mode: 9"},
		{"", "!EOF"},
		{"type=bind,source=/d", "!target is required"},
	} {
		m, _, err := parseMount(tt.in)
		if want, fails := strings.CutPrefix(tt.want, "!"); fails {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %v, want %q", tt.in, err, want)
			}
			continue
		}
		got, jerr := json.Marshal(m)
		if err != nil || jerr != nil || string(got) != tt.want {
			t.Errorf("%s:\ngot  %s, %v\nwant %s", tt.in, got, err, tt.want)
		}
	}
	for in, want := range map[string]string{"type=bind,src=/d,dst=/x,idmap=1:2": "1:2", "type=bind,src=/d,dst=/x,idmap": "auto"} {
		if _, owner, err := parseMount(in); owner.idMap != want || err != nil {
			t.Errorf("%s: %q %v", in, owner, err)
		}
	}
}

func FuzzReadEnvFile(f *testing.F) {
	f.Add([]byte("A=b\n#c\nD\n"))
	f.Add([]byte("\xff=\n =x"))
	path := filepath.Join(f.TempDir(), "env")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		env, err := readKeyFile(path, os.LookupEnv)
		if err != nil {
			return
		}
		for _, e := range env {
			if k, _, ok := strings.Cut(e, "="); !ok || k == "" || strings.ContainsAny(k, " \t\n") {
				t.Errorf("variable %q", e)
			}
		}
	})
}

func TestParseTime(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		in   string
		want time.Time
	}{
		{"", time.Time{}},
		{"10m", now.Add(-10 * time.Minute)},
		{"1h30m", now.Add(-90 * time.Minute)},
		{"2013-01-02T13:23:37Z", time.Date(2013, 1, 2, 13, 23, 37, 0, time.UTC)},
		{"2013-01-02T13:23:37.5+02:00", time.Date(2013, 1, 2, 11, 23, 37, 5e8, time.UTC)},
		{"2013-01-02T13:23", time.Date(2013, 1, 2, 13, 23, 0, 0, time.Local)},
		{"2013-01-02", time.Date(2013, 1, 2, 0, 0, 0, 0, time.Local)},
		{"1136073600", time.Unix(1136073600, 0)},
		{"1136073600.000000001", time.Unix(1136073600, 1)},
		{"1136073600.5", time.Unix(1136073600, 5e8)},
	} {
		got, err := parseTime(tt.in, now)
		if err != nil || !got.Equal(tt.want) {
			t.Errorf("%q: %v, %v, want %v", tt.in, got, err, tt.want)
		}
	}
	for _, bad := range []string{"yesterday", "12:30", "1.x", "2013-13-01"} {
		if got, err := parseTime(bad, now); err == nil {
			t.Errorf("%q is %v", bad, got)
		}
	}
}

func TestParseFilters(t *testing.T) {
	var f filterFlag
	for _, s := range []string{"label=a=b", "", "LABEL = c", "status=exited"} {
		if err := f.Set(s); err != nil {
			t.Error(err)
		}
	}
	if !slices.Equal(f.m["label"], []string{"a=b", "c"}) || !slices.Equal(f.m["status"], []string{"exited"}) || len(f.m) != 2 {
		t.Errorf("%v", f.m)
	}
	if err := f.Set("x"); err == nil {
		t.Error("a filter without = was taken")
	}
	f.words = true
	if err := f.Set("x"); err != nil || !slices.Equal(f.m["x"], []string{"true"}) {
		t.Errorf("%v, %v", f.m, err)
	}
}

// runApp runs a command line that needs no engine and returns its exit code and output.
func runApp(t *testing.T, name string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errb bytes.Buffer
	a := &app{name: name, out: &out, err: &errb}
	code = a.run(context.Background(), args)
	return code, out.String(), errb.String()
}

func TestMistakes(t *testing.T) {
	for _, tt := range []struct {
		line string
		code int
		want string
	}{
		{"frobnicate", 1, "conex: 'frobnicate' is not a conex command\nSee 'conex --help'.\n"},
		{"psx", 1, "conex: 'psx' is not a conex command, did you mean 'ps'?\nSee 'conex --help'.\n"},
		{"iamges", 1, "conex: 'iamges' is not a conex command, did you mean 'images'?\nSee 'conex --help'.\n"},
		{"compose x", 1, "conex: 'compose' is not a conex command yet\nSee 'conex --help'.\n"},
		{"image frob", 1, "conex: 'frob' is not a conex image command\nSee 'conex image --help'.\n"},
		{"run", 1, "conex: 'conex run' requires at least 1 argument\nSee 'conex run --help'.\n"},
		{"rename x", 1, "conex: 'conex rename' requires 2 arguments\nSee 'conex rename --help'.\n"},
		{"ps x", 1, "conex: 'conex ps' accepts no arguments\nSee 'conex ps --help'.\n"},
		{"images a b", 1, "conex: 'conex images' requires at most 1 argument\nSee 'conex images --help'.\n"},
		{"run --nope x", 125, "conex: unknown flag: --nope\nSee 'conex run --help'.\n"},
		{"container run -Z x", 125, "conex: unknown shorthand flag: 'Z' in -Z\nSee 'conex container run --help'.\n"},
		{"build --builder x .", 125, "conex: --builder is not supported yet\nSee 'conex build --help'.\n"},
		{"build --rm=false .", 125, "conex: --rm is always on\nSee 'conex build --help'.\n"},
		{"build --progress x .", 125, "conex: invalid progress mode x: must be one of \"auto\", \"plain\", \"tty\", \"json\" or \"quiet\"\nSee 'conex build --help'.\n"},
		{"--nope ps", 125, "conex: unknown flag: --nope\nSee 'conex --help'.\n"},
		{"--tlsverify ps", 125, "conex: --tlsverify is refused: there is no daemon to connect to: conex works on this machine's files\nSee 'conex --help'.\n"},
	} {
		code, out, errs := runApp(t, "conex", strings.Fields(tt.line)...)
		if code != tt.code || errs != tt.want || out != "" {
			t.Errorf("%s: code %d, want %d\ngot  %s%s\nwant %s", tt.line, code, tt.code, out, errs, tt.want)
		}
	}
	if _, _, errs := runApp(t, "docker", "frobnicate"); errs != "docker: 'frobnicate' is not a docker command\nSee 'docker --help'.\n" {
		t.Errorf("as docker: %s", errs)
	}
}

// TestHelp prints the help of every command: flags that clash would panic.
func TestHelp(t *testing.T) {
	lines := [][]string{{"--help"}, {"help"}}
	for _, c := range commands() {
		lines = append(lines, []string{c.name, "--help"})
		for _, sub := range c.build(&app{name: "conex"}).Commands() {
			lines = append(lines, []string{c.name, sub.Name(), "--help"})
		}
	}
	for _, l := range lines {
		code, out, errs := runApp(t, "conex", l...)
		if code != 0 || errs != "" || !strings.HasPrefix(out, "Usage:  conex") {
			t.Errorf("%v: code %d\n%s%s", l, code, out, errs)
		}
	}
	if _, out, _ := runApp(t, "docker", "run", "--help"); !strings.HasPrefix(out, "Usage:  docker run [OPTIONS] IMAGE") {
		t.Errorf("as docker:\n%s", out)
	}
}
