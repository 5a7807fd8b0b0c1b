package cli

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// versionInfo has Docker's two halves, which are one program here.
type versionInfo struct {
	Client clientVersion
	Server serverVersion
}

type clientVersion struct {
	Platform                       struct{ Name string }
	Version                        string
	APIVersion                     string `json:"ApiVersion"`
	DefaultAPIVersion              string
	GitCommit, GoVersion, Os, Arch string
	BuildTime                      string `json:",omitempty"`
	Context                        string
}

type serverVersion struct {
	Platform                       struct{ Name string }
	Components                     []component
	Version                        string
	APIVersion                     string `json:"ApiVersion"`
	MinAPIVersion                  string
	GitCommit, GoVersion, Os, Arch string
	KernelVersion                  string
	BuildTime                      string `json:",omitempty"`
}

type component struct{ Name, Version string }

// apiVersion is the version of Docker's Engine API whose structs requests and results carry.
const apiVersion = "1.52"

func newVersionInfo() versionInfo {
	rev, when := commit()
	var v versionInfo
	v.Client = clientVersion{Version: Version, APIVersion: apiVersion, DefaultAPIVersion: apiVersion, GitCommit: rev, GoVersion: runtime.Version(),
		Os: runtime.GOOS, Arch: runtime.GOARCH, BuildTime: when, Context: "default"}
	v.Client.Platform.Name = "conex"
	v.Server = serverVersion{Components: []component{{"Engine", Version}}, Version: Version, APIVersion: apiVersion, MinAPIVersion: apiVersion, GitCommit: rev,
		GoVersion: runtime.Version(), Os: runtime.GOOS, Arch: runtime.GOARCH, KernelVersion: kernel(), BuildTime: when}
	v.Server.Platform.Name = "conex, in the same program: there is no daemon"
	return v
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func (a *app) versionCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "version [OPTIONS]", Short: "Show the version information", Args: a.exactly(0),
		RunE: func(*cobra.Command, []string) error {
			v := newVersionInfo()
			if format != "" {
				return writeOne(a.out, format, v)
			}
			var b strings.Builder
			field := func(indent, name, val string) {
				if val != "" {
					fmt.Fprintf(&b, "%s%-18s %s\n", indent, name+":", val)
				}
			}
			b.WriteString("Client: conex\n")
			field(" ", "Version", v.Client.Version)
			field(" ", "API version", v.Client.APIVersion)
			field(" ", "Go version", v.Client.GoVersion)
			field(" ", "Git commit", v.Client.GitCommit)
			field(" ", "Built", v.Client.BuildTime)
			field(" ", "OS/Arch", v.Client.Os+"/"+v.Client.Arch)
			b.WriteString("\nServer: conex (the engine is in the same program, there is no daemon)\n Engine:\n")
			field("  ", "Version", v.Server.Version)
			field("  ", "Kernel version", v.Server.KernelVersion)
			field("  ", "OS/Arch", v.Server.Os+"/"+v.Server.Arch)
			_, err := fmt.Fprint(a.out, b.String())
			return err
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectHelp)
	return cmd
}

// printVersionLine is what -v prints.
func (a *app) printVersionLine() {
	name := a.name
	if name == "docker" {
		name = "Docker" // scripts look for it
	}
	rev, _ := commit()
	if rev == "" {
		rev = "unknown"
	}
	fmt.Fprintf(a.out, "%s version %s, build %s\n", name, Version, rev)
}
