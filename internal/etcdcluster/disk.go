package etcdcluster

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// listenerFD is where a member finds the socket for its listener.
const listenerFD = 3

// superviseSync puts fsync and fdatasync of this process, of all its threads,
// under the supervision of whoever gets the listener that it sends away.
func superviseSync() (err error) {
	defer func() {
		if err != nil { // the other side waits for an answer
			_ = unix.Sendmsg(listenerFD, []byte{0}, nil, nil, 0)
		}
		unix.Close(listenerFD)
	}()
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the system call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_FDATASYNC, Jt: 2},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_FSYNC, Jt: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH
	// Linux 5.19 and newer: the runtime's signals do not start the wait anew.
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&program)))
	if errno == unix.EINVAL {
		fd, _, errno = unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&program)))
	}
	if errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	if err := unix.Sendmsg(listenerFD, []byte{0}, unix.UnixRights(int(fd)), nil, 0); err != nil {
		return os.NewSyscallError("sendmsg", err)
	}
	return os.NewSyscallError("close", unix.Close(int(fd)))
}

// disk is the supervisor of one process's fsync and fdatasync.
type disk struct {
	delay  *atomic.Int64 // of each, in nanoseconds; the member's, over restarts
	synced *atomic.Int64 // how many there were
	file   *os.File
	ended  chan struct{}
}

// socketpair is what a member sends its listener through.
func socketpair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "listener"), os.NewFile(uintptr(fds[1]), "listener"), nil
}

// errNotSlowable says that a member runs without supervision.
var errNotSlowable = errors.New("the system does not let its disk be slowed down (its log says why)")

// newDisk takes the listener that the process behind the socket sends.
func newDisk(socket *os.File, delay, synced *atomic.Int64) (*disk, error) {
	conn, err := net.FileConn(socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%T is no Unix socket", conn)
	}
	if err := u.SetReadDeadline(time.Now().Add(startTimeout)); err != nil {
		return nil, err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	k, n, _, _, err := u.ReadMsgUnix(make([]byte, 1), oob)
	if err == nil && k == 0 {
		err = errors.New("the process ended, or its program does not call Main")
	}
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, errNotSlowable
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("listener: %w", err)
	}
	unix.CloseOnExec(fds[0])
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, os.NewSyscallError("fcntl", err)
	}
	d := &disk{delay: delay, synced: synced, file: os.NewFile(uintptr(fds[0]), "seccomp listener"), ended: make(chan struct{})}
	raw, err := d.file.SyscallConn()
	if err != nil {
		d.file.Close()
		return nil, err
	}
	go func() {
		defer close(d.ended)
		for d.next(raw) == nil {
		}
	}()
	return d, nil
}

// Of <linux/seccomp.h>.
type (
	notification struct {
		id         uint64
		pid, flags uint32
		nr         int32
		arch       uint32
		ip         uint64
		args       [6]uint64
	}
	answer struct {
		id    uint64
		val   int64
		err   int32
		flags uint32
	}
)

// next lets one call pass, in its time.
func (d *disk) next(raw syscall.RawConn) error {
	var n notification
	var failed error
	err := raw.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			_, err := unix.Poll(poll, 0) // to receive would block
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				failed = err
				return true
			}
			break
		}
		switch {
		case poll[0].Revents&unix.POLLIN != 0:
		case poll[0].Revents != 0:
			failed = unix.EPIPE // nobody is left
			return true
		default:
			return false
		}
		n = notification{} // it must be zero
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n))); errno == unix.ENOENT || errno == unix.EINTR {
			return false // it was killed, or starts anew
		} else if errno != 0 {
			failed = errno
		}
		return true
	})
	if err != nil || failed != nil {
		return errors.Join(err, failed)
	}
	d.synced.Add(1)
	pass := func() {
		a := answer{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		// A failure means that the call is gone with its process.
		_ = raw.Control(func(fd uintptr) {
			_, _, _ = unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&a)))
		})
	}
	if delay := time.Duration(d.delay.Load()); delay > 0 {
		time.AfterFunc(delay, pass)
	} else {
		pass()
	}
	return nil
}

// close is for when the process has ended.
func (d *disk) close() {
	d.file.Close()
	<-d.ended
}
