package cli

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/spf13/pflag"

	"conex/internal/container"
)

// containerFlags are the flags that run and create share, and what becomes of them.
type containerFlags struct {
	name, platform, pull, cidfile                 string
	quiet                                         bool
	interactive, tty, rm, init, readOnly          bool
	privileged, publishAll                        bool
	entrypoint, hostname, network, restart        string
	stopSignal, user, workdir                     string
	stopTimeout                                   optInt
	pidsLimit                                     int64
	memory                                        bytesFlag
	cpus                                          cpusFlag
	addHost, capAdd, capDrop, dns, env, envFile   list
	expose, label, mounts, publish, secOpt, tmpfs list
	volumes                                       list
}

func (c *containerFlags) register(f *pflag.FlagSet) {
	f.SetInterspersed(false)
	noShortHelp(f)
	f.Var(&c.addHost, "add-host", "Add a custom host-to-IP mapping (host:ip)")
	f.Var(&c.capAdd, "cap-add", "Add Linux capabilities")
	f.Var(&c.capDrop, "cap-drop", "Drop Linux capabilities")
	f.StringVar(&c.cidfile, "cidfile", "", "Write the container ID to the file")
	f.Var(&c.cpus, "cpus", "Number of CPUs")
	f.Var(&c.dns, "dns", "Set custom DNS servers")
	f.StringVar(&c.entrypoint, "entrypoint", "", "Overwrite the default ENTRYPOINT of the image")
	f.VarP(&c.env, "env", "e", "Set environment variables")
	f.Var(&c.envFile, "env-file", "Read in a file of environment variables")
	f.Var(&c.expose, "expose", "Expose a port or a range of ports")
	f.StringVarP(&c.hostname, "hostname", "h", "", "Container host name")
	f.BoolVar(&c.init, "init", false, "Run an init inside the container that forwards signals and reaps processes")
	f.BoolVarP(&c.interactive, "interactive", "i", false, "Keep STDIN open even if not attached")
	f.VarP(&c.label, "label", "l", "Set meta data on a container")
	f.VarP(&c.memory, "memory", "m", "Memory limit")
	f.Var(&c.mounts, "mount", "Attach a filesystem mount to the container")
	f.StringVar(&c.name, "name", "", "Assign a name to the container")
	f.StringVar(&c.network, "network", "", `Connect a container to a network ("bridge", "none", "host")`)
	f.StringVar(&c.network, "net", "", "")
	f.Lookup("net").Hidden = true
	f.Int64Var(&c.pidsLimit, "pids-limit", 0, "Tune container pids limit (set -1 for unlimited)")
	f.StringVar(&c.platform, "platform", os.Getenv("DOCKER_DEFAULT_PLATFORM"), "Set the platform of the image to pull")
	f.BoolVar(&c.privileged, "privileged", false, "Give extended privileges to this container")
	f.VarP(&c.publish, "publish", "p", "Publish a container's port(s) to the host")
	f.BoolVarP(&c.publishAll, "publish-all", "P", false, "Publish all exposed ports to random ports")
	f.StringVar(&c.pull, "pull", "missing", `Pull image before running ("always", "missing", "never")`)
	f.BoolVarP(&c.quiet, "quiet", "q", false, "Suppress the pull output")
	f.BoolVar(&c.readOnly, "read-only", false, "Mount the container's root filesystem as read only")
	f.StringVar(&c.restart, "restart", "no", "Restart policy to apply when a container exits")
	f.BoolVar(&c.rm, "rm", false, "Automatically remove the container when it exits")
	f.Var(&c.secOpt, "security-opt", "Security Options")
	f.StringVar(&c.stopSignal, "stop-signal", "", "Signal to stop the container")
	f.Var(&c.stopTimeout, "stop-timeout", "Timeout (in seconds) to stop a container")
	f.Var(&c.tmpfs, "tmpfs", "Mount a tmpfs directory")
	f.BoolVarP(&c.tty, "tty", "t", false, "Allocate a pseudo-TTY")
	f.StringVarP(&c.user, "user", "u", "", "Username or UID (format: <name|uid>[:<group|gid>])")
	f.VarP(&c.volumes, "volume", "v", "Bind mount a folder or file of the host, or a volume")
	f.StringVarP(&c.workdir, "workdir", "w", "", "Working directory inside the container")
	refuseAll(f, "annotation", "a|attach", "blkio-weight", "blkio-weight-device", "cgroup-parent", "cgroupns", "cpu-count", "cpu-percent",
		"cpu-period", "cpu-quota", "cpu-rt-period", "cpu-rt-runtime", "c|cpu-shares", "cpuset-cpus", "cpuset-mems", "device",
		"device-cgroup-rule", "device-read-bps", "device-read-iops", "device-write-bps", "device-write-iops", "disable-content-trust?",
		"dns-opt", "dns-option", "dns-search", "domainname", "gpus", "group-add", "health-cmd", "health-interval", "health-retries",
		"health-start-interval", "health-start-period", "health-timeout", "io-maxbandwidth", "io-maxiops", "ip", "ip6", "ipc",
		"isolation", "kernel-memory", "label-file", "link", "link-local-ip", "log-driver", "log-opt", "mac-address",
		"memory-reservation", "memory-swap", "memory-swappiness", "network-alias", "net-alias", "no-healthcheck?", "oom-kill-disable?",
		"oom-score-adj", "pid", "runtime", "shm-size", "storage-opt", "sysctl", "ulimit", "use-api-socket?", "userns", "uts",
		"volume-driver", "volumes-from")
}

// configs turns the flags into Docker's two structs. f tells what was given at all. args are the image and its command.
func (c *containerFlags) configs(f *pflag.FlagSet, args []string) (*apic.Config, *apic.HostConfig, error) {
	if !slices.Contains([]string{"always", "missing", "never"}, c.pull) {
		return nil, nil, fmt.Errorf("invalid pull option: '%s': must be one of \"always\", \"missing\" or \"never\"", c.pull)
	}
	env, err := environment(c.envFile, c.env)
	if err != nil {
		return nil, nil, err
	}
	cfg := &apic.Config{
		Hostname: c.hostname, User: c.user, Tty: c.tty, OpenStdin: c.interactive, StdinOnce: c.interactive,
		AttachStdin: c.interactive, AttachStdout: true, AttachStderr: true,
		ExposedPorts: network.PortSet{}, Env: env, Image: args[0], WorkingDir: c.workdir, Labels: keyValues(c.label),
		StopSignal: c.stopSignal, StopTimeout: c.stopTimeout.v,
	}
	if len(args) > 1 {
		cfg.Cmd = args[1:]
	}
	if f.Changed("entrypoint") {
		cfg.Entrypoint = []string{c.entrypoint} // [""] takes the image's away
	}
	if c.stopSignal != "" {
		if _, err := container.ParseSignal(c.stopSignal); err != nil {
			return nil, nil, err
		}
	}
	if c.workdir != "" && !strings.HasPrefix(c.workdir, "/") {
		return nil, nil, fmt.Errorf("the working directory '%s' is invalid, it needs to be an absolute path", c.workdir)
	}
	host := &apic.HostConfig{
		ContainerIDFile: c.cidfile, PortBindings: network.PortMap{}, AutoRemove: c.rm, CapAdd: c.capAdd, CapDrop: c.capDrop,
		Privileged: c.privileged, PublishAllPorts: c.publishAll, ReadonlyRootfs: c.readOnly,
		Resources: apic.Resources{Memory: int64(c.memory), NanoCPUs: int64(c.cpus)},
	}
	if f.Changed("init") {
		host.Init = &c.init
	}
	if f.Changed("pids-limit") {
		host.PidsLimit = &c.pidsLimit
	}
	if err := parsePublish(c.publish, cfg.ExposedPorts, host.PortBindings); err != nil {
		return nil, nil, err
	}
	if err := parseExpose(c.expose, cfg.ExposedPorts); err != nil {
		return nil, nil, err
	}
	for _, step := range []func(*apic.HostConfig) error{c.setNetwork, c.setRestart, c.setHosts, c.setSecurity} {
		if err := step(host); err != nil {
			return nil, nil, err
		}
	}
	if err := c.setMounts(cfg, host); err != nil {
		return nil, nil, err
	}
	return cfg, host, nil
}

func (c *containerFlags) setNetwork(host *apic.HostConfig) error {
	if strings.Contains(c.network, "=") {
		return fmt.Errorf("--network %s: options of a network are not supported yet", c.network)
	}
	host.NetworkMode = apic.NetworkMode(cmp.Or(c.network, "default"))
	return nil
}

func (c *containerFlags) setRestart(host *apic.HostConfig) error {
	name, n, limited := strings.Cut(c.restart, ":")
	p := apic.RestartPolicy{Name: apic.RestartPolicyMode(name)}
	if limited {
		count, err := strconv.Atoi(n)
		if err != nil {
			return errors.New("invalid restart policy format: maximum retry count must be an integer")
		}
		p.MaximumRetryCount = count
	}
	if err := apic.ValidateRestartPolicy(p); err != nil {
		return err
	}
	if c.rm && !p.IsNone() {
		return errors.New("conflicting options: cannot specify both --restart and --rm")
	}
	host.RestartPolicy = p
	return nil
}

func (c *containerFlags) setMounts(cfg *apic.Config, host *apic.HostConfig) error {
	for _, v := range c.volumes {
		bind, anonymous, err := parseVolume(v)
		if err != nil {
			return err
		}
		if anonymous != "" {
			if cfg.Volumes == nil {
				cfg.Volumes = map[string]struct{}{}
			}
			cfg.Volumes[anonymous] = struct{}{}
			continue
		}
		host.Binds = append(host.Binds, bind)
	}
	for _, v := range c.tmpfs {
		target, options, err := parseTmpfs(v)
		if err != nil {
			return err
		}
		addTmpfs(host, target, options)
	}
	for _, v := range c.mounts {
		m, tmpfs, err := parseMount(v)
		if err != nil {
			return err
		}
		if m.Type == mount.TypeTmpfs {
			addTmpfs(host, m.Target, tmpfs)
			continue
		}
		host.Mounts = append(host.Mounts, m)
	}
	return nil
}

func addTmpfs(host *apic.HostConfig, target, options string) {
	if host.Tmpfs == nil {
		host.Tmpfs = map[string]string{}
	}
	host.Tmpfs[target] = options
}

func (c *containerFlags) setHosts(host *apic.HostConfig) error {
	for _, h := range c.addHost {
		name, ip, ok := strings.Cut(h, "=")
		if !ok {
			name, ip, ok = strings.Cut(h, ":")
		}
		if !ok || name == "" {
			return fmt.Errorf("bad format for add-host: %q", h)
		}
		ip = strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")
		if ip != "host-gateway" {
			if _, err := netip.ParseAddr(ip); err != nil {
				return fmt.Errorf("invalid IP address in add-host: %q", ip)
			}
		}
		host.ExtraHosts = append(host.ExtraHosts, name+":"+ip)
	}
	for _, d := range c.dns {
		a, err := netip.ParseAddr(d)
		if err != nil {
			return fmt.Errorf("invalid argument %q for \"--dns\" flag: IP address is not correctly formatted: %s", d, d)
		}
		host.DNS = append(host.DNS, a)
	}
	return nil
}

// setSecurity reads --security-opt. A seccomp profile is read here, where the user's path means something, and handed on as text.
func (c *containerFlags) setSecurity(host *apic.HostConfig) error {
	for _, o := range c.secOpt {
		k, v, ok := strings.Cut(o, "=")
		if !ok {
			k, v, ok = strings.Cut(o, ":") // Docker's old form
		}
		switch {
		case k == "no-new-privileges" && !ok:
		case !ok:
			return fmt.Errorf("invalid --security-opt: %q", o)
		case k == "systempaths" && v == "unconfined":
			host.MaskedPaths, host.ReadonlyPaths = []string{}, []string{}
			continue
		case k == "seccomp" && v != "unconfined" && v != "builtin":
			raw, err := os.ReadFile(v)
			if err != nil {
				return fmt.Errorf("opening seccomp profile (%s) failed: %w", v, err)
			}
			var compact bytes.Buffer
			if err := json.Compact(&compact, raw); err != nil {
				return fmt.Errorf("compacting json for seccomp profile (%s) failed: %w", v, err)
			}
			o = "seccomp=" + compact.String()
		case k == "seccomp", k == "no-new-privileges", k == "apparmor", k == "label":
			o = k + "=" + v
		default:
			return fmt.Errorf("invalid --security-opt: %q", o)
		}
		host.SecurityOpt = append(host.SecurityOpt, o)
	}
	return nil
}
