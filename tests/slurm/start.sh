#!/usr/bin/env bash
# A one-node Slurm with eight declared H200s on loopback, and an SSH server to reach it, in namespaces of their own:
#     unshare --net --pid --mount-proc --uts --ipc --fork --kill-child tests/slurm/start.sh FOLDER COMMAND...
# Runs COMMAND beside it. Mounts, users, processes and the host's name are seen in here only, and are gone with it.
# FOLDER: absolute, for everything that is written; wheels/ and wheels-sky/ in it have the packages for the node.
set -euo pipefail
if [ $$ -ne 1 ]; then # not the first process of a namespace: what is mounted here would be mounted for the whole machine
    echo "start.sh is run by tests/slurm/run, in namespaces of its own" >&2
    exit 2
fi
root=$1 here=$PWD
shift
cd / # the folder that a process stands in would be the one before the mounts
hostname node
ip link set lo up
ip address add 192.0.2.1/32 dev lo # Slurm asks the resolver, which gives no address to a machine that has only 127.0.0.1
mkdir -p "$root"/{tmp,home/student,run/munge,etc,log,state,spool,munge,dev,bin,client}
chmod 1777 "$root/tmp"
for entry in /tmp/*/; do # what is there stays to be seen; what is added goes into the folder
    mkdir -p "$root$entry"
    mount --bind "$entry" "$root$entry"
done
mount --rbind "$root/tmp" /tmp
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/munge
cp -a /etc/passwd /etc/group /etc/shadow /etc/hosts "$root/etc/"
echo 'student:x:4242:4242::/home/student:/bin/bash' >>"$root/etc/passwd"
echo 'student:x:4242:' >>"$root/etc/group"
echo 'student:*:19000:0:99999:7:::' >>"$root/etc/shadow"
echo '127.0.0.1 localhost node' >"$root/etc/hosts"
for file in passwd group shadow hosts; do mount --bind "$root/etc/$file" "/etc/$file"; done
mount --bind "$root/home" /home
chown -R 4242:4242 /home/student

# Devices that nothing stands behind: what Slurm counts.
for number in 0 1 2 3 4 5 6 7; do
    test -e "$root/dev/h200_$number" || mknod "$root/dev/h200_$number" c 1 3
done
echo "NodeName=node Name=gpu Type=H200 File=$root/dev/h200_[0-7]" >"$root/gres.conf"
cat >"$root/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=node(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/socket
CryptoType=crypto/munge
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=$root/spool
StateSaveLocation=$root/state
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
PrologSlurmctld=$root/prolog.sh
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=30
NodeName=node NodeAddr=127.0.0.1 Port=16818 CPUs=64 RealMemory=512000 Gres=gpu:H200:8 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=12:00:00 State=UP
CONF
export SLURM_CONF=$root/slurm.conf

# What SkyPilot would download for a node comes from the folder: uv, the Python and the packages of its runtime.
cat >"$root/prolog.sh" <<PROLOG
#!/bin/bash
case \$SLURM_JOB_NAME in apprentice-*) ;; *) exit 0 ;; esac
{
    home="/home/student/.sky_clusters/\$SLURM_JOB_NAME"
    install -d -o student -g student /home/student/.sky_clusters "\$home" "\$home/.local" "\$home/.local/bin"
    ln -sf "$root/bin/uv" "\$home/.local/bin/uv"
    install -d -o student -g student "/tmp/\$SLURM_JOB_NAME"
    runtime="/tmp/\$SLURM_JOB_NAME/skypilot-runtime"
    test -d "\$runtime" || su -s /bin/sh student -c ". $root/offline; $root/bin/uv venv --quiet --no-config --seed --python /usr/bin/python3 \$runtime"
} >>"$root/log/prolog.log" 2>&1
exit 0
PROLOG
chmod +x "$root/prolog.sh"
cat >"$root/offline" <<OFFLINE
export UV_OFFLINE=1 UV_NO_INDEX=1 UV_FIND_LINKS=$root/wheels-sky UV_PYTHON_DOWNLOADS=never
OFFLINE

test -f "$root/munge/munge.key" || (umask 077 && head -c 1024 /dev/urandom >"$root/munge/munge.key")
chown -R munge:munge "$root/munge" "$root/run/munge" /run/munge
chmod 755 /run/munge
setsid su -s /bin/sh munge -c "exec /usr/sbin/munged --foreground --force --key-file=$root/munge/munge.key \
    --socket=/run/munge/socket --pid-file=/run/munge/pid --log-file=$root/munge/munged.log \
    --seed-file=$root/munge/munged.seed" >"$root/log/munged.out" 2>&1 &
for _ in $(seq 100); do test -S /run/munge/socket && break || sleep 0.1; done
setsid /usr/sbin/slurmctld -D -f "$SLURM_CONF" >"$root/log/slurmctld.out" 2>&1 &
setsid /usr/sbin/slurmd -D -f "$SLURM_CONF" >"$root/log/slurmd.out" 2>&1 &

# The way in, and the client's own home with the keys to it.
export HOME=$root/client
mkdir -p "$HOME/.ssh" "$HOME/.slurm" "$HOME/.sky/catalogs/v8/common" /home/student/.ssh
test -f "$HOME/.ssh/id_ed25519" || ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/id_ed25519"
test -f "$root/hostkey" || ssh-keygen -q -t ed25519 -N '' -f "$root/hostkey"
cp "$HOME/.ssh/id_ed25519.pub" /home/student/.ssh/authorized_keys
chown -R 4242:4242 /home/student
cat >"$root/sshd_config" <<CONF
Port 2222
ListenAddress 127.0.0.1
HostKey $root/hostkey
PidFile /run/sshd.pid
UsePAM no
PasswordAuthentication no
StrictModes no
MaxSessions 200
MaxStartups 150:30:200
SetEnv PATH=/usr/local/bin:/usr/bin:/bin SLURM_CONF=$root/slurm.conf UV_OFFLINE=1 UV_NO_INDEX=1 UV_FIND_LINKS=$root/wheels-sky UV_PYTHON_DOWNLOADS=never
Subsystem sftp internal-sftp
CONF
setsid /usr/sbin/sshd -D -e -f "$root/sshd_config" >"$root/log/sshd.out" 2>&1 &
cat >"$HOME/.slurm/config" <<CONF
Host loopback
    HostName 127.0.0.1
    Port 2222
    User student
    IdentityFile $HOME/.ssh/id_ed25519
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
CONF
cat >"$HOME/.sky/config.yaml" <<CONF
slurm:
  pricing:
    accelerators:
      H200: 3.5
CONF
printf 'AcceleratorName,Clouds\nH200,slurm\n' >"$HOME/.sky/catalogs/v8/common/accelerators.csv"
export SKYPILOT_DISABLE_USAGE_COLLECTION=1
for _ in $(seq 200); do sinfo --noheader --format=%t 2>/dev/null | grep -q idle && break || sleep 0.2; done
sinfo --noheader --format='%N %t %G'
cd "$here"
"$@"
