package cli

import (
	"cmp"
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/docker/go-units"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"

	"conex/internal/build"
)

// buildRunFlags are the flags of build that its RUN steps are about.
type buildRunFlags struct {
	secrets, agents, allow, addHosts, ulimits list
	network, cgroupParent                     string
	shmSize, memory                           bytesFlag
	memorySwap                                string
	cpuShares, cpuPeriod                      uint64
	cpuQuota                                  int64
	cpusetCpus, cpusetMems                    string
}

func (r *buildRunFlags) register(f *pflag.FlagSet) {
	f.Var(&r.addHosts, "add-host", `Add a custom host-to-IP mapping (format: "host:ip")`)
	f.Var(&r.allow, "allow", `Allow extra privileged entitlement (e.g., "network.host", "security.insecure", "device")`)
	f.StringVar(&r.cgroupParent, "cgroup-parent", "", `Set the parent cgroup for the "RUN" instructions during build`)
	f.StringVar(&r.network, "network", "default", `Set the networking mode for the "RUN" instructions during build`)
	f.Var(&r.secrets, "secret", `Secret to expose to the build (format: "id=mysecret[,src=/local/secret]")`)
	f.Var(&r.shmSize, "shm-size", `Shared memory size for build containers`)
	f.Var(&r.agents, "ssh", `SSH agent socket or keys to expose to the build (format: "default|<id>[=<socket>|<key>[,<key>]]")`)
	f.Var(&r.ulimits, "ulimit", "Ulimit options")
	f.VarP(&r.memory, "memory", "m", "Memory limit of RUN steps")
	f.StringVar(&r.memorySwap, "memory-swap", "", `Swap limit equal to memory plus swap: "-1" to enable unlimited swap`)
	f.Uint64VarP(&r.cpuShares, "cpu-shares", "c", 0, "CPU shares (relative weight) of RUN steps")
	f.Uint64Var(&r.cpuPeriod, "cpu-period", 0, "Limit the CPU CFS (Completely Fair Scheduler) period of RUN steps")
	f.Int64Var(&r.cpuQuota, "cpu-quota", 0, "Limit the CPU CFS (Completely Fair Scheduler) quota of RUN steps")
	f.StringVar(&r.cpusetCpus, "cpuset-cpus", "", `CPUs in which to allow execution ("0-3", "0,1")`)
	f.StringVar(&r.cpusetMems, "cpuset-mems", "", `MEMs in which to allow execution ("0-3", "0,1")`)
}

// apply puts what the flags say into a request.
func (r *buildRunFlags) apply(req *build.Request) error {
	req.Allow, req.Network, req.AddHosts, req.ShmSize, req.CgroupParent = r.allow, r.network, r.addHosts, int64(r.shmSize), r.cgroupParent
	for _, v := range r.secrets {
		id, s, err := parseSecret(v)
		if err != nil {
			return fmt.Errorf("--secret %s: %w", v, err)
		}
		if req.Secrets == nil {
			req.Secrets = map[string]build.Secret{}
		}
		req.Secrets[id] = s
	}
	for _, v := range r.agents {
		id, a := parseAgent(v)
		if _, twice := req.Agents[id]; twice {
			return fmt.Errorf("--ssh %s: duplicate agent ID %q", v, id)
		}
		if req.Agents == nil {
			req.Agents = map[string]build.Agent{}
		}
		req.Agents[id] = a
	}
	for _, v := range r.ulimits {
		u, err := units.ParseUlimit(v)
		if err != nil {
			return fmt.Errorf("--ulimit %s: %w", v, err)
		}
		req.Ulimits = append(req.Ulimits, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
	}
	return r.limits(req)
}

func (r *buildRunFlags) limits(req *build.Request) error {
	memory, swap := int64(r.memory), int64(0)
	if r.memorySwap != "" && r.memorySwap != "-1" {
		var err error
		if swap, err = units.RAMInBytes(r.memorySwap); err != nil {
			return fmt.Errorf("--memory-swap %s: %w", r.memorySwap, err)
		}
	} else if r.memorySwap == "-1" {
		swap = -1
	}
	switch {
	case memory == 0 && swap > 0:
		return errors.New("--memory-swap needs --memory")
	case swap > 0 && swap < memory:
		return errors.New("--memory-swap counts memory and swap together: it can't be less than --memory")
	case memory > 0:
		swap = cmp.Or(swap, 2*memory) // Docker's rule
		req.Memory = &specs.LinuxMemory{Limit: &memory, Swap: &swap}
	}
	cpu := specs.LinuxCPU{Cpus: r.cpusetCpus, Mems: r.cpusetMems}
	if r.cpuShares > 0 {
		cpu.Shares = &r.cpuShares
	}
	if r.cpuPeriod > 0 {
		cpu.Period = &r.cpuPeriod
	}
	if r.cpuQuota != 0 {
		cpu.Quota = &r.cpuQuota
	}
	if cpu != (specs.LinuxCPU{}) {
		req.CPU = &cpu
	}
	return nil
}

// parseSecret reads a value of --secret: id=ID[,src=FILE|,env=VARIABLE]. An id alone is a variable of that name, else a file.
func parseSecret(v string) (id string, s build.Secret, err error) {
	fields, err := csv.NewReader(strings.NewReader(v)).Read()
	if err != nil {
		return "", s, errors.New("it is no list of key=value")
	}
	kind := ""
	for _, f := range fields {
		key, val, ok := strings.Cut(f, "=")
		if !ok {
			return "", s, fmt.Errorf("invalid field '%s' must be a key=value pair", f)
		}
		switch strings.ToLower(key) {
		case "type":
			if val != "file" && val != "env" {
				return "", s, fmt.Errorf("unsupported secret type %q", val)
			}
			kind = val
		case "id":
			id = val
		case "source", "src":
			s.File = val
		case "env":
			s.Env = val
		default:
			return "", s, fmt.Errorf("unexpected key '%s' in '%s'", key, f)
		}
	}
	if id == "" {
		return "", s, errors.New("secret missing ID")
	}
	if kind == "env" && s.Env == "" {
		s.Env, s.File = s.File, ""
	}
	if s.Env == "" && s.File == "" {
		if _, set := os.LookupEnv(id); kind == "env" || set && kind == "" {
			s.Env = id
		} else {
			s.File = id
		}
	}
	if s.Env != "" {
		s.File = ""
	}
	return id, s, nil
}

// parseAgent reads a value of --ssh: ID[=SOCKET|KEY[,KEY...]]. Without a path it is the agent that SSH_AUTH_SOCK names.
func parseAgent(v string) (id string, a build.Agent) {
	id, paths, _ := strings.Cut(v, "=")
	if paths == "" {
		paths = os.Getenv("SSH_AUTH_SOCK")
	}
	if paths != "" {
		a.Paths = strings.Split(paths, ",")
	}
	return cmp.Or(id, "default"), a
}
